"""`python -m d2lora.dashboard`: goes on working beside `python -m d2lora dashboard`."""

from d2lora.__main__ import main

if __name__ == "__main__":
    main("dashboard")
