"""An answer as a person or a program reads it: terminal, JSON, notebook; and errors. Nothing is decided here."""
