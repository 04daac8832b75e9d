"""``python spoiling_proxy.py HOST:PORT DROPPED LOST``: spoils requests to an object store; prints its port.

DROPPED: names of headers (lower case) that are not forwarded; LOST: numbers of PUTs, from 1, whose answers are.
"""

import http.client
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TARGET = sys.argv[1]
DROPPED = set(sys.argv[2].split(","))
LOST = {int(number) for number in sys.argv[3].split(",") if number}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    puts = 0

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in DROPPED}
        connection = http.client.HTTPConnection(TARGET)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        Handler.puts += self.command == "PUT"
        if self.command == "PUT" and Handler.puts in LOST:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        head = answer.getheader("content-length", "0")
        self.send_header("content-length", head if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
