"""Rows to text by a chat template, with what is scored marked, and where the turns of a text begin."""
