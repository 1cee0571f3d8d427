-- schema_v1: which migration this database is at, and the oldest client (by its newest migration) that fits it.
CREATE OR REPLACE FUNCTION commandbus.schema_v1() RETURNS TABLE (version integer, oldest_client integer)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT max(m.version), max(m.oldest_client) FROM commandbus.migration m
$$;
