"""Listing the Hub into a catalogue."""
