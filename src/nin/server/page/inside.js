export async function inside() {}
