"""The zoo: every classifier of torchvision, timm and transformers through capture, candidates, program and backends.

Random weights: what is checked is that a model can be cut and that every backend gives its answers, not accuracy.
"""
