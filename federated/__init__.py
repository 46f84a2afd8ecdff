"""Training over clients that keep their records; federate.py is the script."""
import os

# the folder of the scripts: alternation and clients start some of them as processes of their own
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
