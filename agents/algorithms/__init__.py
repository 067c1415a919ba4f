"""What an algorithm is, and one file for each.

`base` has the loop that all share, `learner` its optimizer steps, `registry` their names and what is refused. A file
that registers an algorithm, here or in a module of yours, is all that it takes to add one.
"""
