def write(out):
  return out / 'scores.json'
