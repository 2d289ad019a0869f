"""What tools/train.py, test.py and infer.py do, once their command lines are parsed."""
