"""
What gauntlet.py does to the fork: kinds of rounds, one in each module. The
package is the Django application that their tables belong to, too.
"""
