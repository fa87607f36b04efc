"""People look at images: what raters said of them, in RichHF's format and others, consolidated."""
