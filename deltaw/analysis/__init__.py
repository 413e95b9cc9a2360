"""What an adapter is, in numbers: Adapter in, numbers or an Adapter out. No base, unless the number is about W."""
