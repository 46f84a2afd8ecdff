"""Federated training on Flower: the parts of federate.py."""
