"""Hostile input: what reads files, notes between ranks and requests, tried with inputs that somebody else wrote.

`targets` are functions of bytes that may raise the errors that the program has for bad input, and nothing else. Two engines
use them: coverage-guided fuzzing (atheris, `python -m tests.fuzz`), and drawn changes of structure (`test_fuzz.py` with
hypothesis, or `python -m tests.fuzz --engine structure`). Both are held to `limits`. An input that once broke something is
kept in `finds/TARGET/`, and is a test.
"""
