"""The commands of `python -m zoo`: arguments and printing; what they do is done by functions of the zoo."""
