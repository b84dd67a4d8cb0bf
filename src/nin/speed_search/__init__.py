"""`nin.speed`: measure the forms, number types and engines of a network side by side, and keep the fastest.

This file imports nothing: processes that run one engine have the memory of that engine alone.
"""
