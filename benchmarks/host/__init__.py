"""Host time of a pass: what Python and the launches cost where attention itself takes no time."""
