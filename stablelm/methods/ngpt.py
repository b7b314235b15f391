NGPT=None
