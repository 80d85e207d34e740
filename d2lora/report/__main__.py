"""`python -m d2lora.report`: goes on working beside `python -m d2lora report`."""

from d2lora.__main__ import main

if __name__ == "__main__":
    main("report")
