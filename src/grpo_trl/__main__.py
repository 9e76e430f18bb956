"""`python -m grpo_trl` is `grpo-trl`, for launchers that take a module."""

from .cli import main


if __name__ == "__main__":
    main()
