"""The console command ``graftrec``: every command of `etl` and `trainer`, what the machine has, and completion.

In a wheel, all of `conf/` and `mlflow_projects/` lie beside this file.
"""
