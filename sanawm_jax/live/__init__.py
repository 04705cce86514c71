"""The live world: a page on which a person walks through a world while it is made."""
