/** The server behind the page, and the token that it may want. */
let bearer = null;

/** Its answer to a GET, or to a POST of a body. What it refuses is thrown, in its words. */
const send = async (path, body, more = {}) => {
  const headers = bearer === null ? {} : { authorization: `Bearer ${bearer}` };
  if (body) headers["content-type"] = "application/json";
  const how = { headers, credentials: "omit", cache: "no-store", ...more, ...(body && { method: "POST", body: JSON.stringify(body) }) };
  let found;
  try {
    found = await fetch(path, how);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (found.status === 401) {
    const was = bearer;
    bearer = null;
    at("all").hidden = true;
    document.querySelector("nav").hidden = true; // a link bears no token
    at("token-form").hidden = false;
    at("token").focus();
    throw new Error(was === null ? "" : "The server does not take this token.");
  }
  if (found.ok) return found;
  const { error } = await found.json().catch(() => ({ error: `The server answered with status ${found.status}.` }));
  throw new Error(typeof error === "string" ? error : error.message);
};

/** Begin, and once more with every token that is given. */
const beginWithToken = (begin) => {
  const tried = async () => {
    try {
      await begin();
    } catch (error) {
      complain(error.message);
      return;
    }
    complain("");
    at("token-form").hidden = true;
    at("all").hidden = false;
    if (bearer !== null) at("text").focus();
  };
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    bearer = at("token").value.trim();
    at("token").value = "";
    tried();
  });
  tried();
};
