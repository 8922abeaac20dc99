"""python main.py --config=NAME [--workdir=DIR] [--config.FIELD=…]: see lm/__main__.py."""

from lm.__main__ import main

if __name__ == "__main__":
    main()
