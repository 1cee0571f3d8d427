-- What JSON may be given to the functions. The size of a value is that of its text as PostgreSQL writes it,
-- octet_length(value::text) of the jsonb: what is stored and handed to workers, however the sender spelled it.
-- `[]` has one level. send_v1 has the same limits in its own statement: a call of a function costs 2 us a row.

-- limits_v1: what the owner of the database allows: max_data_bytes of commandbus.setting.
CREATE OR REPLACE FUNCTION commandbus.limits_v1() RETURNS TABLE (max_data_bytes integer)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce((SELECT s.value::integer FROM commandbus.setting s WHERE s.name = 'max_data_bytes'), 262144)
$$;

-- _in_bounds: whether this value may be kept: its size and its levels.
CREATE OR REPLACE FUNCTION commandbus._in_bounds(p_value jsonb, p_max_bytes integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT octet_length(p_value::text) <= p_max_bytes
       AND NOT jsonb_path_exists(p_value, 'strict $.**{64} ? (@.type() == "object" || @.type() == "array")')
$$;

-- _check_json: this text as jsonb. Raises CB001 when it is too large or too deep, 22xxx when it is no JSON.
CREATE OR REPLACE FUNCTION commandbus._check_json(
    p_command_id uuid, p_field text, p_text text, p_max_bytes integer DEFAULT 1048576) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v_value jsonb := p_text;
BEGIN
    IF NOT commandbus._in_bounds(v_value, p_max_bytes) THEN
        RAISE EXCEPTION 'command %: % is out of bounds', p_command_id, p_field
            USING ERRCODE = 'CB001', HINT = format(
                'Nothing was written; it may have %s bytes as text and 64 levels.', p_max_bytes);
    END IF;
    RETURN v_value;
END $$;
