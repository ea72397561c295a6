"""What any library of RLHF can be held against: see contract.py."""
