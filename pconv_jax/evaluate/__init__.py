"""Comparison of networks and baselines by hole bin, as in section 4.2 of the paper."""
