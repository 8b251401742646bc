"""Drop-in surfaces: flashgen behind other libraries' own interfaces."""
