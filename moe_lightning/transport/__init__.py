"""Messages between a master and its expert workers, and two ways to carry them.

Nothing here knows of models: a worker gets a handler for requests, a master gets answers.
"""
