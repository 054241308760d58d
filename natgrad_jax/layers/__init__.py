"""Layers: what is known of each before any number is."""
