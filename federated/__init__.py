"""Training over clients that keep their records; federate.py is the script."""
import os

# the folder of the scripts, which alternation and clients start as separate processes
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
