"""``python -m trainer.report RESULTS.json --folder FOLDER``: draws a report again from kept results."""

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

from trainer.report.report import main

if __name__ == "__main__":
    stopping.leave(main())
