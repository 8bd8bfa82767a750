"""A model of one streaming multiprocessor (SM), driven by what ptxas made of a kernel.

It predicts and measures nothing: README.md says how far it may err.
"""
