"""``graftrec completion bash|zsh``: a script that completes commands, settings, and names of configurations.

A command's settings are asked for once a shell, by `graftrec COMMAND --words`; configurations are files, so the shell
lists them itself.
"""

import shlex
from collections.abc import Sequence

from etl.command import WORDS, CommandParser
from etl.settings import CONF_VARIABLE, conf_roots

_BASH = """\
_graftrec() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$current"))
  elif [ "$previous" = --config ]; then
    local root file
    for root in "${{{variable}:-conf}}" {shipped}; do
      for file in "$root"/*/*.yaml; do
        [ -f "$file" ] && file="${{file#"$root"/}}" && file="${{file%.yaml}}" || continue
        case " ${{COMPREPLY[*]}} " in *" $file "*) continue ;; esac
        case "$file" in "$current"*) COMPREPLY+=("$file") ;; esac
      done
    done
    COMPREPLY+=($(compgen -f -- "$current"))
  elif [[ "$current" == -* ]]; then
    local cache="_graftrec_words_${{command//[^a-zA-Z]/_}}"
    [ -n "${{!cache}}" ] || printf -v "$cache" '%s' "$("${{COMP_WORDS[0]}}" "$command" {words} 2>/dev/null)"
    COMPREPLY=($(compgen -W "${{!cache}}" -- "$current"))
  else
    COMPREPLY=($(compgen -W "$([ "$command" = completion ] && echo bash zsh)" -f -- "$current"))
  fi
}}
complete -o filenames -F _graftrec graftrec
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"  # which runs bash's


def script(shell: str, commands: Sequence[str]) -> str:
    """The script of a shell, bash or zsh, for these commands."""
    text = _BASH.format(
        commands=" ".join(commands),
        variable=CONF_VARIABLE,
        shipped=shlex.quote(str(conf_roots()[-1].resolve())),
        words=WORDS,
    )
    return text if shell == "bash" else _ZSH + text


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec completion") -> int:
    from graftrec.commands import COMMANDS

    parser = CommandParser(program, description='print a shell\'s completion: eval "$(graftrec completion bash)"')
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(arguments).shell, list(COMMANDS)), end="", flush=True)
    return 0
