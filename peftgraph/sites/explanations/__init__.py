"""Why a site is one, and why a selector finds nothing."""
