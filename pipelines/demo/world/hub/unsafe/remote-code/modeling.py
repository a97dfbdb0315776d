raise RuntimeError("this repository's code was imported; it must never be")
