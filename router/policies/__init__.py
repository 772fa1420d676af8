"""Placement policies: pure, one short module each, behind the seam in base.py."""
