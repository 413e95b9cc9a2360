"""Adapter in, numbers or Adapter out. No base is needed, and no dense ΔW unless a number is about its entries."""
