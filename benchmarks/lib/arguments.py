"""What the scripts read from their command lines."""

import argparse


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return int(text)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
