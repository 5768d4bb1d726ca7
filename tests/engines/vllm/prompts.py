"""What the engines of these tests are asked, as token ids; importing it imports no engine."""

NEW_TOKENS = 24
PROMPTS = [[(37 * n + 11 * k * k) % 500 + 2 for k in range(12)] for n in range(8)]


def traffic(number):
    """Other prompts, made of few tokens, so that the load of the experts changes from round to round."""
    return [[(17 * number + 5 * n + k % 3) % 500 + 2 for k in range(16)] for n in range(8)]
