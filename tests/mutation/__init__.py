"""Mutation tests: which changes to the code would the tests beside a module not notice?"""
