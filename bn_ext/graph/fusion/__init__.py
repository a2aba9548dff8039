"""Batch norm, addition and activation become one call in the graphs that Dynamo captures."""
