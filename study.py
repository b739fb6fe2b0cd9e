"""The tables of the paper as runs: `python study.py list TABLE`, `plan`, `name`; what the scripts ask."""

from config.rows import main

if __name__ == "__main__":
    main()
