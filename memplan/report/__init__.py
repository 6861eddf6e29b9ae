"""Answers and errors as a person or a program reads them. Nothing is decided here."""
