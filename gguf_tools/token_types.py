"""What GGUF calls the kinds of tokens, and two conventions of the tokens themselves."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # how a space is written in SentencePiece's tokens

ADDED_SCORE = -1000.0
"""Of tokens added to a SentencePiece model. They are found before it sees the text, which then goes
on like a new one; user-defined pieces of its own, with other scores, are found by it."""
