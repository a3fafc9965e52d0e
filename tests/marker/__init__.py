"""Marks any student's folder of this lab, question by question: `python -m tests.marker FOLDER`."""
