"""`python -m d2lora.fetch`: goes on working beside `python -m d2lora fetch`."""

from d2lora.__main__ import main

if __name__ == "__main__":
    main("fetch")
