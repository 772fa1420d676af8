"""A router process that answers nothing."""

import time

if __name__ == "__main__":
    time.sleep(60.0)
