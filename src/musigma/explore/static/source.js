// Where answers come from: requests to the server. All addresses are relative, so they keep the
// token of the page. A page without a server has another module in place of this one.

/** An answer of the server. Throws an Error whose message is for the user. */
export async function ask(name, parameters = {}, body = null) {
  const known = Object.entries(parameters).filter(([, v]) => v !== null && v !== undefined);
  const address = `api/${name}?${new URLSearchParams(known)}`;
  let response;
  try {
    response = await fetch(address, body === null ? {} : { method: "POST", body });
  } catch {
    throw new Error("The server does not answer. Is `musigma explore` still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.message ?? `The server answers ${response.status}.`);
  return answer;
}
