"""
A database backend for PostgreSQL that records what is sent, for draw.py.
"""
