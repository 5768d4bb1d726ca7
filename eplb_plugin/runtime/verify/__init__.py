"""Are the weights the right ones?"""
