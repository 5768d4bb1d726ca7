"""Advice from a recorded load: is balancing worth it, with which settings, and how reliable is that?"""
