"""`python -m cli` is the `flora` command, also where nothing was installed."""

from cli.main import run

if __name__ == "__main__":
    run()
